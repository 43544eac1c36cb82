"""One task, or two that share their data, per file; `cafe.evaluation.registry` names them all."""
