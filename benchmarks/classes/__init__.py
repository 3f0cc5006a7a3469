"""The class-conditional unlearning study: data, base model, classifier, measurement, tables."""
