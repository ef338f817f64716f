"""Fine-tuning: tasks, features, objectives, recipes, metrics, prediction."""
