"""What a trained model can do, measured: suites, scores with intervals, and contact sheets."""
