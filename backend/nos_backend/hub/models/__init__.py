"""The built-in models: each module is a source that executors run by itself, as a user's file would be."""
