"""A package, so that its one JupyterLab and its browser end with its last test: Playwright's loop runs until then."""
