"""Reading pairs: columns and their roles, files, checks."""
