"""Run by test_evaluation.py under `accelerate launch`: counts many generated datasets on real processes."""

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from accelerate import Accelerator

from res2net_zoo.data.labels import Classes
from res2net_zoo.evaluation import evaluate
from tests.test_evaluation import NUM_CLASSES, ReadsItsAnswer, answers_and_labels, make_source

accelerator = Accelerator(cpu=True)
for n in (1, 2, 5, 12, 17, 30):
    for batch_size in (1, 7):
        for shards in (0, 2):
            source = make_source(*answers_and_labels(n), shards=min(shards, n))
            counts = evaluate(ReadsItsAnswer(), source, Classes(NUM_CLASSES), accelerator, batch_size, workers=0)
            result = {"n": n, "num_processes": accelerator.num_processes}
            result |= {"samples": counts.samples, "top1": counts.top1, "top5": counts.top5}
            accelerator.print(json.dumps(result))
accelerator.end_training()
