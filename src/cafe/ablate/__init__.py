"""`cafe ablate`: what each of the two losses does, from the same base, data, steps and seeds."""
