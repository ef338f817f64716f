"""Pre-training: text, corruption, the generator-discriminator pair."""
