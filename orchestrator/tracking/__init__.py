"""MLflow: what it is told, and what it is asked."""
