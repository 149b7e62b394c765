// BITS wires delayed by DEPTH registers; DEPTH 0 is a wire.
module delay #(
    parameter BITS = 1,
    parameter DEPTH = 1
) (
    input  logic            clk,
    input  logic            reset,
    input  logic [BITS-1:0] in,
    output logic [BITS-1:0] out
);
  generate
    if (DEPTH == 0) begin : wires
      assign out = in;
    end else begin : registers
      logic [DEPTH*BITS-1:0] line;
      wire [(DEPTH+1)*BITS-1:0] shifted = {line, in};
      always_ff @(posedge clk) line <= reset ? {DEPTH * BITS{1'b0}} : shifted[DEPTH*BITS-1:0];
      assign out = line[DEPTH*BITS-1-:BITS];
    end
  endgenerate
endmodule
