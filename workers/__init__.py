"""What runs inside every training process: `connect`, and the log it returns.

Importing this loads neither torch nor ray.
"""

from __future__ import annotations

from logsync.workers.door import connect
from logsync.workers.follower import FollowerLog
from logsync.workers.text_log import get_logger
from logsync.workers.training_log import TrainingLog
from logsync.workers.transports.base import Transport

__all__ = ["FollowerLog", "TrainingLog", "Transport", "connect", "get_logger"]
