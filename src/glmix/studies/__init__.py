"""The paper's studies: rows that differ in one thing, trained side by side, and what came out of them."""
