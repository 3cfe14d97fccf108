"""What a run learns from: vocabularies, files of tokens, and the batches taken from them."""
