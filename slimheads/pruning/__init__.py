"""What is deleted and how: scores, selection, the plan, gates that mask, and the surgery that deletes."""
