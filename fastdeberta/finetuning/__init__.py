"""Fine-tuning: labelled data, metrics, sequence classification."""
