"""Read the result files of load generators: one module for each format, and what they share."""
