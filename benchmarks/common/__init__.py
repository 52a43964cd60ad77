"""What the benchmarks share: servers, requests, prompts, scores, controls, results."""
