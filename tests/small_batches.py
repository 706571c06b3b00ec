"""Words for a batch of the embedded model that is played in a second."""

EVERY_VERDICT = ["--reward.shared_controls=false", "--reward.settled=0"]
"""No verdict is spared, whatever the embedded model's own configuration spares."""

SMALL = [
    "--train.batch=4",
    "--rollout.samples=3",
    "--rollout.views=1",
    "--rollout.box_tokens=24",
    "--rollout.query_tokens=8",
]
