"""medray: tunes medical vision-language models on a Ray cluster."""
