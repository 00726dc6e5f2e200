"""What everything stands on: dtypes, mesh axes, and the letters of a row."""
