// Runs the programs of a file on the tile pipeline; a counter stands for the array.
//
// +requests=FILE: per program one line of decimals "steps buffers latency rate way_rate pipelined store_on_channel ties",
// then per step one line "load_bytes compute_cycles store_bytes". +answers=FILE: per program its cycles.
module pipeline_bench #(
    parameter STEP_BITS = 14
)
`ifdef VERILATOR
(
    input logic clk
);
`else
;
  logic clk = 1'b0;
  always #1 clk = !clk;
`endif
  localparam BYTES_BITS = 24;

  logic [BYTES_BITS-1:0] load_table[0:(1<<STEP_BITS)-1];
  logic [31:0] compute_table[0:(1<<STEP_BITS)-1];
  logic [BYTES_BITS-1:0] store_table[0:(1<<STEP_BITS)-1];

  logic reset, start, running;
  logic [STEP_BITS-1:0] steps;
  logic [1:0] buffers;
  logic [6:0] latency;
  logic [BYTES_BITS+7:0] rate, way_rate;
  logic pipelined, store_on_channel, ties;

  wire [STEP_BITS-1:0] load_step, compute_step;
  wire compute_start, finished;
  wire [31:0] cycles;

  // the array's place: busy for compute_table[step] cycles
  logic [31:0] left;
  wire [31:0] now_left = compute_start ? compute_table[compute_step] : left;
  always_ff @(posedge clk) left <= reset ? 32'd0 : (now_left == 32'd0 ? 32'd0 : now_left - 32'd1);

  /* verilator lint_off PINCONNECTEMPTY */
  tile_pipeline #(
      .STEP_BITS (STEP_BITS),
      .BYTES_BITS(BYTES_BITS)
  ) pipeline (
      .clk(clk),
      .reset(reset),
      .buffers(buffers),
      .latency(latency),
      .rate(rate),
      .way_rate(way_rate),
      .pipelined(pipelined),
      .store_on_channel(store_on_channel),
      .ties(ties),
      .start(start),
      .steps(steps),
      .load_step(load_step),
      .load_bytes(load_table[load_step]),
      .compute_step(compute_step),
      .store_bytes(store_table[compute_step]),
      .compute_start(compute_start),
      .compute_done(now_left == 32'd1),
      .load_take(),
      .load_done(),
      .store_done(),
      .finished(finished),
      .cycles(cycles)
  );
  /* verilator lint_on PINCONNECTEMPTY */

  // the file's side
  /* verilator lint_off BLKSEQ */
  integer requests, answers, read, i, steps_read, buffers_read, latency_read, rate_read, way_read;
  integer pipelined_read, channel_read, ties_read;
  reg [8*1024-1:0] path;
  logic [2:0] warm_up;

  initial begin
    reset = 1'b1;
    start = 1'b0;
    running = 1'b0;
    warm_up = 3'd7;
    if ($value$plusargs("requests=%s", path) == 0) path = "";
    requests = $fopen(path, "r");
    if ($value$plusargs("answers=%s", path) == 0) path = "";
    answers = $fopen(path, "w");
    if (requests == 0 || answers == 0) begin
      $display("pipeline_bench: +requests=FILE and +answers=FILE have to be files that can be opened");
      $finish;
    end
  end

  always @(posedge clk) begin
    if (warm_up != 3'd0) begin
      warm_up <= warm_up - 3'd1;
      reset   <= warm_up != 3'd1;
    end else if (reset) begin  // between programs: latency and rate may change only when nothing is under way
      reset <= 1'b0;
      start <= 1'b1;
      running <= 1'b1;
    end else if (running) begin
      start <= 1'b0;
      if (finished) begin
        $fwrite(answers, "%0d\n", cycles);
        running <= 1'b0;
      end
    end else begin
      read = $fscanf(
          requests, "%d %d %d %d %d %d %d %d\n", steps_read, buffers_read, latency_read, rate_read, way_read,
          pipelined_read, channel_read, ties_read
      );
      if (read != 8) begin
        $fclose(answers);
        $finish;
      end else begin
        for (i = 0; i < steps_read; i = i + 1) begin
          read = $fscanf(requests, "%d %d %d\n", load_table[i], compute_table[i], store_table[i]);
        end
        steps <= steps_read[STEP_BITS-1:0];
        buffers <= buffers_read[1:0];
        latency <= latency_read[6:0];
        rate <= rate_read;
        way_rate <= way_read;
        pipelined <= pipelined_read[0];
        store_on_channel <= channel_read[0];
        ties <= ties_read[0];
        reset <= 1'b1;
      end
    end
  end
endmodule
