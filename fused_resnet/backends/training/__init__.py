"""The training passes, one module for each kind of hardware; `dispatch` chooses among them."""
