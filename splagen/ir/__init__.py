"""Programs: equations over arrays with named axes, their oracle and their passes."""
