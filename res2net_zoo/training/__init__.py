"""What training loops need beside timm's and Accelerate's: data, checkpoints, reports."""
