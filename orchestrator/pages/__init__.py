"""What people look at: the report, its figures, the tables of the terminal."""
