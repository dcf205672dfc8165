"""The library: contract, learning, evaluation and gate; usable without any of the platform's tools."""
