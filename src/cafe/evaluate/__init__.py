"""How good is a model: one task per file, each over callables that a model gives.

A task takes pictures with what is known about them (`cafe.evaluate.data`) and what a model does
(`cafe.evaluate.task`), and returns a `Result`: scores, and per sample what they were averaged from.
`cafe.evaluate.run` names the tasks.
"""
