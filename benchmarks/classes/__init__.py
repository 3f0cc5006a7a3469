"""Parts of the class-conditional unlearning study: data, base model, classifier, measurement."""
