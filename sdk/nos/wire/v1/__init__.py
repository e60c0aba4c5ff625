"""Generated from proto/nos/v1 by `make proto`; never edited."""
