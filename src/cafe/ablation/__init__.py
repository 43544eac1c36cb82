"""`cafe ablate`: what each of the two losses does, from the same base, data, steps and seeds.

An *arm* is one training variant: the language loss only, the contrastive loss only, both (`joint`),
or both with another contrastive weight (the sweep). The base model, which is evaluated but not
trained, is listed with the arms. A *run* is one arm with one seed.
"""
