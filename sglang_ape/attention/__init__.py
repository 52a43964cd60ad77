"""How rows attend: the plan by segments, and one file a backend."""
