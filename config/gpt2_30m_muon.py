"""30M with Muon on the blocks' matrices and AdamW on the rest."""

include = "gpt2_30m.py"

optimizer = "muon"
learning_rate = 1.2e-3  # AdamW's, to whose updates Muon's are scaled: a starting point to tune
out_dir = "out/gpt2_30m_muon"
