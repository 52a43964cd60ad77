"""How likely a query is after each of its contexts alone: the scores behind soft and refine."""
