"""What a model or a run is and did, told to its user."""
