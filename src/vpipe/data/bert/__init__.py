"""BERT's training sets: sentence pairs, masked, on disk, and what prepares and reads them."""
