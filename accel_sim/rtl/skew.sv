// A triangle of registers: lane i of LANES is delayed by i cycles, or by LANES - 1 - i where REVERSED.
module skew #(
    parameter LANES = 4,
    parameter BITS = 8,
    parameter REVERSED = 0
) (
    input  logic                  clk,
    input  logic                  reset,
    input  logic [LANES*BITS-1:0] in,
    output logic [LANES*BITS-1:0] out
);
  genvar i;
  generate
    for (i = 0; i < LANES; i = i + 1) begin : lane
      delay #(
          .BITS (BITS),
          .DEPTH(REVERSED ? LANES - 1 - i : i)
      ) registers (
          .clk  (clk),
          .reset(reset),
          .in   (in[i*BITS+:BITS]),
          .out  (out[i*BITS+:BITS])
      );
    end
  endgenerate
endmodule
