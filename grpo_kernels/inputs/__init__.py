"""Arguments as users give them, checked and brought into one form: [B, T], samples and their groups, ranks."""
