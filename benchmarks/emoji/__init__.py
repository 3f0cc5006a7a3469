"""The embedded emoji model: data, training and assessment. Run in the order that README.md gives."""
