"""The operators that torch.compile sees: schemas, fake implementations, and checks that need the data."""
