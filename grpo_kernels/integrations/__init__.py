"""The losses inside other people's trainers, one module for each; nothing here is imported until you import it."""
