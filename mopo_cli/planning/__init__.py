"""Truth beside the benchmark: what is attainable, and the method on tables of preferences."""
