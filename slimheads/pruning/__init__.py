"""What is deleted and how: scores, selection, gates that mask, and the surgery that deletes."""
