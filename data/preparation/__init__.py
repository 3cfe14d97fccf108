"""From a corpus to files of tokens: what the scripts data/NAME/prepare.py share."""
