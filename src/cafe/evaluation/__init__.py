"""Evaluation: tasks measure a model, results are stored with their columns, and are compared.

Open `run` first: `evaluate` is the job behind `cafe evaluate`, as `compare.compare` is that behind
`cafe compare`. From there:

    run          evaluates a model on tasks and keeps the results
    registry     all tasks and suites by name, and where their data comes from
    task         what a task is: `Task`, its inputs (`TaskSetup`) and its result (`TaskResult`)
    tasks/       one protocol per file: retrieval, captions, POPE, CHAIR, THRONE, VQA, ranking, gap
    scenes/      the same protocols on the bundled world, with exact ground truth
    mmeb/        MMEB: images, videos, visual documents, and the leaderboard report
    datasets/    readers that turn files or hub rows into the inputs of tasks
    harness/     adapters for mteb and lmms-eval
    model_calls  the functions of a model that tasks use: plain, cached, or shared among ranks
    asking       questions and free descriptions, on top of these functions
    journal      answers of an unfinished run, so that the next one resumes
    scoring      scores and intervals as functions of column sums
    results      the result file
    compare      paired differences between result files, with published numbers

A task sees functions, never a model, and returns a `TaskResult`: scores, and the per-sample columns
from which they are computed.
"""
