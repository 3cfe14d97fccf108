"""Properties of the program, a file for each kind."""
