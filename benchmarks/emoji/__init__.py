"""The embedded emoji model: data, training and assessment, to be run in the order of README.md."""
