"""Side-by-side measurements: attention alone, training steps, memory, scaling, throughput (`karat bench ...`)."""
