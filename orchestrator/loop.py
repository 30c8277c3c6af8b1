"""The main loop: take rollouts no staler than allowed, weigh, learn, publish, record, save.

    request ---> sampler, graders ---> take ---> pack ---> learn ---> publish
       ^                                                                 |
       +----------------------- weights of a new version ----------------+

Batch i is learned from at step i and may be requested as soon as the policy is at most `max_staleness` steps behind
i. At 0 each batch is sampled from the very weights that then learn from it. Which behaviour policy samples batch i (TRB
at the budget of step i, say) is the plan's at i.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from orchestrator.run import Run


def train(run: "Run") -> None:
    """Learn until the recipe's last step, or until the run is told to stop."""
    weights = run.learner.publish()
    run.evaluator.before(run.first_step, weights)
    for step in run.steps():
        for index in run.admitted(step):
            run.queue.request(index, weights, run.behaviour(index))
        experience = run.queue.take(step)
        batch, grades = run.pack(step, experience)
        report = run.learn(step, batch, experience)
        weights = run.learner.publish()
        run.record(step, experience, grades, report)
        run.evaluator.run_if_due(step + 1, weights)
        run.checkpoints.save_if_due(step + 1)
    run.finish(weights)
