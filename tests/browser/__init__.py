"""A package: so its JupyterLab and its browser, whose loop runs until then, end with its last test."""
