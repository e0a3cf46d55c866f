"""Batch jobs: requests from one JSONL file, answers to another, resumable at any point."""

from __future__ import annotations

from moe_lightning.jobs.answers import BatchLLM
from moe_lightning.jobs.job import BatchJob, JobStatus
from moe_lightning.jobs.paths import JobFiles
from moe_lightning.jobs.survey import Survey, open_input, survey_input

__all__ = ["BatchJob", "BatchLLM", "JobFiles", "JobStatus", "Survey", "open_input", "survey_input"]
