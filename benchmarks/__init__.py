"""Speed and memory of jaxsoft beside its peers: `python -m benchmarks`."""
