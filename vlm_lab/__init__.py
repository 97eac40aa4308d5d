"""vlm_lab: the open lab bench for vision-language models. Importing this package imports nothing heavy."""

__version__ = "0.1.0"
