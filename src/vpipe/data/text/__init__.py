"""Text on its way into a training set: documents, sentences, tokens."""
