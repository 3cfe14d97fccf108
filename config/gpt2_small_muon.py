"""125M with Muon on the blocks' matrices and AdamW on the rest."""

include = "gpt2_small.py"

optimizer = "muon"
learning_rate = 6e-4  # AdamW's, to whose updates Muon's are scaled: a starting point to tune
out_dir = "out/gpt2_small_muon"
